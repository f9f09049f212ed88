"""What ``fwpkm backends`` tells: found.py reads metadata, checking.py runs one call of each part, listing.py prints."""
