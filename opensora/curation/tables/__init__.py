"""Operations on tables of any size: rows are streamed; what needs all rows is sorted on disk."""
