"""Do the tests see plausible mistakes? A campaign that is run by hand: see CONTRIBUTING.md."""
