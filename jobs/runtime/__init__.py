"""What every job needs: the Ray cluster, progress, submission, model files."""
