"""Print the project's requirements, extras included, one per line: `requirements.py EXTRA,EXTRA`.

The image installs them in a layer of their own, which survives a change of the code.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = list(project["dependencies"])
for extra in filter(None, sys.argv[1].split(",")):
    wanted += project["optional-dependencies"][extra]
print(*(requirement.replace(" ", "") for requirement in wanted), sep="\n")
