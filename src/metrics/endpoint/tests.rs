use super::*;

fn send(address: &MetricsAddress, request: &str) -> String {
    let mut response = String::new();
    match address {
        MetricsAddress::Tcp(address) => {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            let _ = stream.read_to_string(&mut response);
        }
        MetricsAddress::Unix(path) => {
            let mut stream = UnixStream::connect(path).unwrap();
            stream.write_all(request.as_bytes()).unwrap();
            let _ = stream.read_to_string(&mut response);
        }
    }
    response
}

#[test]
fn metrics_are_served_over_tcp_and_on_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for address in [MetricsAddress::Tcp(free), MetricsAddress::Unix(dir.path().join("m.sock"))] {
        serve(&address, || Gauges { snapshots: 5, ..Gauges::default() }).unwrap();
        let response =
            send(&address, "GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: application/openmetrics-text\r\n\r\n");
        assert!(response.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text"), "{response}");
        assert!(response.contains("cvmfs_snapshotter_snapshots 5\n") && response.ends_with("# EOF\n"), "{response}");
        assert!(send(&address, "GET /metrics?x=1 HTTP/1.0\r\n\r\n").contains("text/plain; version=0.0.4"));
        assert!(send(&address, "HEAD /metrics HTTP/1.1\r\n\r\n").ends_with("close\r\n\r\n"));
        assert!(send(&address, "GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(send(&address, "POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
        assert_eq!(
            send(&address, &"x".repeat(3 * MAX_REQUEST_BYTES)),
            "",
            "a client that sends no request is disconnected"
        );
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(MAX_REQUEST_BYTES));
        assert_eq!(send(&address, &long), "", "a client with a request that is too long is disconnected");
        assert!(
            matches!(serve(&address, Gauges::default), Err(Error::Tcp { .. } | Error::Unix(_))),
            "the address is in use"
        );
    }
}

#[test]
fn prometheus_text_names_counters_as_their_samples() {
    let text = "# HELP a x.\n# TYPE a counter\na_total 1\n# HELP b_seconds y.\n# TYPE b_seconds histogram\n# UNIT b_seconds seconds\n# EOF\n";
    let expected =
        "# HELP a_total x.\n# TYPE a_total counter\na_total 1\n# HELP b_seconds y.\n# TYPE b_seconds histogram\n";
    assert_eq!(to_prometheus_text(text), expected);
}

#[test]
fn silent_client_does_not_block_others() {
    let dir = tempfile::tempdir().unwrap();
    let address = MetricsAddress::Unix(dir.path().join("m.sock"));
    serve(&address, Gauges::default).unwrap();
    let _silent = UnixStream::connect(dir.path().join("m.sock")).unwrap();
    assert!(send(&address, "GET /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200"));
}
