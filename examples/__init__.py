"""What a user writes themselves, one file each; docs/extending.md tells the contracts."""
