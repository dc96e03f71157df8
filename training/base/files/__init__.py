"""Where a base's files lie and what their headers say. Nothing here imports torch but `single_file`, run by itself."""
