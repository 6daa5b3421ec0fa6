"""What the regularizers do in tasks other than classification, in programs of their own."""
