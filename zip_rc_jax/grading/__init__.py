"""Answers: how they are found in a text, compared and graded."""
