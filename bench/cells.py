"""Cells of the tables on the pages: a row for each provider, from its record."""

from collections.abc import Callable, Iterable

from fused_rl.bench.records import ALLOCATING, MIB, PRODUCTS, Record, error_of

Cell = Callable[[Record], str]


def number(name: str, digits: int, unit: float = 1.0) -> Cell:
    """The cell that shows a field in a unit; empty where there is none."""

    def cell(record: Record) -> str:
        value = record.get(name)
        return "" if value is None else f"{value / unit:.{digits}f}"

    return cell


def ratio(name: str, one: str) -> Cell:
    """The cell of a ratio, which is 1 of the products themselves."""
    plain = number(name, 2)
    return lambda record: "1" if record["provider"] == one else plain(record)


def error(record: Record) -> str:
    found = error_of(record)
    return "" if found is None else f"{found:.0e}"


TIME, USER = (number(f"{name}_median", 0, 1e-3) for name in ("seconds", "user_seconds"))
MEMORY = number("peak_extra_bytes", 0, MIB)
TO_PRODUCTS = ratio("ratio_to_products", PRODUCTS)
# Where there is one kind of products.
PLAIN = (TIME, TO_PRODUCTS, MEMORY, error)
COLUMNS = {
    "time, ms": TIME,
    "user CPU, ms": USER,
    "x bare products": TO_PRODUCTS,
    "x products that allocate": ratio("ratio_to_allocating_products", ALLOCATING),
    "extra memory, MiB": MEMORY,
    "error": error,
}
# Of results from before both kinds of products were measured.
OLDER_COLUMNS = dict(
    zip(("time, ms", "x products that allocate", "extra memory, MiB", "error"), PLAIN, strict=True)
)


def columns_of(records: list[Record]) -> dict[str, Cell]:
    """The columns of a CPU's result, by which products its ratios are to."""
    return COLUMNS if any("ratio_to_allocating_products" in r for r in records) else OLDER_COLUMNS


def row(record: Record, cells: Iterable[Cell] = PLAIN) -> str:
    """One provider, or bare products."""
    cells = [*cells]
    if (verdict := record.get("verdict", "right")) != "right":
        reason = f": {record['note'][:70]}" if "note" in record else ""
        return f"| {record['provider']} | {verdict}{reason} |" + " |" * (len(cells) - 1)
    name = record["provider"]
    if name == PRODUCTS:
        name = f"**{record['case']}** ({record['nhv']} NHV)"
    texts = (cell(record) for cell in cells)
    return f"| {name} |" + "".join(f" {text} |" if text else " |" for text in texts)
