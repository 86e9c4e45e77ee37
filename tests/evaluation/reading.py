"""What a test sees of a page."""

from html.parser import HTMLParser

from kuavo_train.metrics.verdict import RetentionLimits

QUICK = RetentionLimits(resamples=500)


class Page(HTMLParser):
    """The page's numbers (pointer, form, text), whatever it would load from elsewhere, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.numbers: list[tuple[str, str, str]] = []
        self.loaded: list[str] = []
        self.text = ""
        self._open: tuple[str, str] | None = None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if "data-pointer" in attributes:
            self._open = (attributes["data-pointer"], attributes["data-form"])
            self.numbers.append((*self._open, ""))
        self.loaded += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.text += data
        if self._open:
            self.numbers[-1] = (*self._open, data)
            self._open = None
