"""The site and everything done to it: find, read, edit, replace."""
