"""A validation → report.json, report.html and junit.xml, and what changed between two of them."""
