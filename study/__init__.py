"""The study: does PMD beat SDPO, when, and why? See README.md."""
