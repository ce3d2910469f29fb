# The Python standard library of this machine, as bytes: about 12 MB of code, nothing to download.
# The last twentieth of its files, in alphabetical order, is the validation set.
#     python fineweb.py config/data/stdlib.py
import sysconfig

_lib = sysconfig.get_path("stdlib")
files = f"{_lib}/**/*.py"
exclude = f"{_lib}/site-packages/*,{_lib}/dist-packages/*,*/test/*,*/tests/*,*/idle_test/*"
tokenizer = "bytes"
val_fraction = 0.05
out_dir = "data/stdlib"
