"""The top of an HTML page as a picture: `python docs/page_picture.py PAGE.html PICTURE.png`.

Needs `pip install PyQt6-WebEngine`. It is a process of its own, for its browser wants one.
"""

import os
import sys
from pathlib import Path

from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

WIDTH, HEIGHT = 1000, 3200  # of the window, in pixels
SETTLING, LONGEST = 3_000, 60_000  # ms


def draw(page: Path, picture: Path) -> bool:
    """Draw the top of a page; whether the picture was written."""
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    os.environ.setdefault("QTWEBENGINE_CHROMIUM_FLAGS", "--no-sandbox --disable-gpu --hide-scrollbars")
    application = QApplication(sys.argv[:1])
    view = QWebEngineView()
    view.resize(WIDTH, HEIGHT)
    view.show()

    def write() -> None:
        view.grab().save(str(picture))
        application.quit()

    view.loadFinished.connect(lambda _: QTimer.singleShot(SETTLING, write))
    view.load(QUrl.fromLocalFile(str(page.resolve())))
    QTimer.singleShot(LONGEST, application.quit)
    application.exec()
    return picture.is_file()


if __name__ == "__main__":
    sys.exit(0 if draw(*map(Path, sys.argv[1:])) else 1)
