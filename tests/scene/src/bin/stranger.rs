//! A program that is no containerd and listens at a socket without answering. With other arguments than the path of a
//! socket it writes its user, arguments and environment to a file beside it, by which a test sees that it was run.

use std::fs;
use std::os::unix::net::UnixListener;

fn main() {
    let words: Vec<String> = std::env::args().collect();
    if let [_, socket] = &words[..]
        && socket.starts_with('/')
    {
        let listener = UnixListener::bind(socket).expect("the socket is new");
        listener.incoming().for_each(drop);
    }
    let own = std::env::current_exe().expect("this program knows where it is");
    let user = nix::unistd::geteuid();
    let environment: Vec<(String, String)> = std::env::vars().collect();
    fs::write(own.with_extension("ran"), format!("{user} {words:?} {environment:?}")).expect("a file can be written");
}
