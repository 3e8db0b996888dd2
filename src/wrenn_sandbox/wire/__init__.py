"""The seam between the control plane and a host: one interface and the data it carries."""
