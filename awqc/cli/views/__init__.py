"""What ``awqc inspect`` shows, a file for each view."""
