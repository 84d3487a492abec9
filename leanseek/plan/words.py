"""Sums of money, numbers of tokens and spans of time as one says them."""


def money(usd: float) -> str:
    """Dollars as one says them."""
    if usd >= 1e6:
        return f"${usd / 1e6:.3f}M"
    return f"${usd:,.0f}" if usd >= 100 else f"${usd:,.2f}"


def amount(value: float) -> str:
    """14.8T, 62.9B, 3.0M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}" if value / size < 100 else f"{value / size:.0f}{unit}"
    return f"{value:.0f}"


def energy(kwh: float) -> str:
    return f"{kwh / 1000:,.0f} MWh" if kwh >= 10_000 else f"{kwh:,.3g} kWh" if kwh < 1000 else f"{kwh:,.0f} kWh"


def duration(days: float) -> str:
    if days >= 1:
        return f"{days:.1f} days"
    return f"{days * 24:.1f} hours" if days * 24 >= 1 else f"{days * 1440:.1f} minutes"
