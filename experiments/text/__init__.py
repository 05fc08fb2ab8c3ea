"""Networks of text: their data, which Python brings along, training in minutes, and their int8."""
