"""Running models on annotated questions, and scoring what they say."""
