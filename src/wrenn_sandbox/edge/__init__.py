"""The way from the outside to the ports of sandboxes: addresses, heads, and bytes both ways."""
