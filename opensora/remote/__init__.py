"""Requests to other machines that the user has named."""
