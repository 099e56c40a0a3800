"""The stages of curation: each computes columns of one clip."""
