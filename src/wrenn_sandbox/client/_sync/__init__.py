# Made by tools/make_sync_client.py from _async/__init__.py: change that file.
