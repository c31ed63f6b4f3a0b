"""The one exception whose message is meant for the person at the keyboard.

It is the scores' own class: whoever catches one catches both, and the command line prints it as one line and exits
with code 2.
"""

from eval.errors import UserError as UserError
