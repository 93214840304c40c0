"""One prepared script for a short time on a GPU: everything that can only be shown there, in order of worth."""
