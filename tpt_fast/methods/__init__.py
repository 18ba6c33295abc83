"""Methods: from the features of an image's views to its answer, one file each."""
