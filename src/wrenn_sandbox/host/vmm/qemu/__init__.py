"""The QEMU driver: stock QEMU, `microvm` machine, KVM where it works, else TCG."""
