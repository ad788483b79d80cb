"""Models on disk: read tensor by tensor, written under the names that engines know."""
