"""Many small trainings over one corpus, judged by the same cases."""
