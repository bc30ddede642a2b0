"""The report as data, HTML and charts."""
