//! Lines that stand in the output of every run, such as how many operations a test has tried. libtest captures what
//! passing tests print with `println!`; it does not capture what is written to standard error directly.

use std::fmt;
use std::io::{self, Write};

pub fn print(line: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}
