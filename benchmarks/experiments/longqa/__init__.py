"""`make longqa`: from books to questions to scores on held-out books."""
