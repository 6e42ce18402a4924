"""A trained model online: an HTTP service over an export, with new items live. No request loads torch or RecBole."""
