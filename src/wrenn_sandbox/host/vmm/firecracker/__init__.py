"""Firecracker, from version 1.13 on, under KVM."""
