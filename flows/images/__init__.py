"""Layout and files of the images that commands and reports draw."""
