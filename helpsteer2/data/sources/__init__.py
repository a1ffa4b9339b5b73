"""Where groups come from: one class a data set, each reading the Hub, a folder, or a file."""
