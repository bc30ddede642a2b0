"""Where pairs come from: lists, folders, drawn scenes; and which are opted out."""
