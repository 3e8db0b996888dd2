"""Guest memory: which pages a machine owns, how they are stored and put back."""
