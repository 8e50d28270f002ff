"""`fused-rl mismatch`: what mismatch_report says of a rollout that was written to a file, in words
and as a picture.
"""
