"""Whole hosts in a box: a release with systemd, cgroup v2 and a KVM that works, on any machine."""
