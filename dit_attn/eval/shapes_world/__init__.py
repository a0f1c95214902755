"""The world of drawn shapes: exact captions, a drawing for each, and a verifier that reads images back."""
