"""What everything stands on: files, this machine, work spread over processes. Knows nothing of models."""
