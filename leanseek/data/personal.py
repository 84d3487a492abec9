"""Personal data and secrets: what looks like an e-mail address, a telephone number or a key is replaced by its name."""

import re

PATTERNS = {
    "e-mail": re.compile(r"\b[A-Za-z0-9._%+-]+@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\b"),
    # As written with a country's code, or as in North America; plain runs of digits are left alone.
    "phone": re.compile(
        r"(?<![\w.+-])(?:\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,4}\)?){2,5}"
        r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-])"
    ),
    "key": re.compile(
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----"
        r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bsk-[A-Za-z0-9_-]{20,}"
        r"|\bAIza[A-Za-z0-9_-]{35}\b|\bxox[abprs]-[A-Za-z0-9-]{10,}|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
        re.DOTALL,
    ),
}
FEWEST_DIGITS = 8  # of a telephone number with a country's code


def mask(text: str) -> tuple[str, dict[str, int]]:
    """The text with [e-mail], [phone] and [key] in their places, and how many of each there were."""
    found: dict[str, int] = {}
    for name, pattern in PATTERNS.items():

        def replace(match: re.Match[str], name: str = name) -> str:
            if name == "phone" and sum(map(str.isdigit, match[0])) < FEWEST_DIGITS:
                return match[0]
            found[name] = found.get(name, 0) + 1
            return f"[{name}]"

        text = pattern.sub(replace, text)
    return text, found
