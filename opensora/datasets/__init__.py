"""Videos and images in and out, tables of them, batches by size. May import `config`, `files` and `errors`."""
