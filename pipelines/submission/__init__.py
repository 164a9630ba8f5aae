"""Sending a job to a cluster and following it there."""
