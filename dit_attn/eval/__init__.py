"""Evaluation: image and video metrics, the verifiable shapes world, attention statistics and HTML reports."""
