"""The report of a run or of a comparison as one page, and the contact sheet."""
