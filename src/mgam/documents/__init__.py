"""Documents: from files to text, from text to digests, and questions asked of them."""
