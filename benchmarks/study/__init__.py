"""The paper's claims at a small scale: runs, verdicts, and the page that shows them."""
