// Program gopeer serves snapshotters that the benchmark compares others with.
//
//	gopeer bind REPOSITORY ROOT SOCKET   the engine of the Go cvmfs-snapshotter: the remote
//	                                     snapshotter of stargz, and a file system that binds what
//	                                     REPOSITORY publishes unpacked. As the Go daemon does, it
//	                                     empties its snapshots when it is stopped normally
//	gopeer memory SOCKET                 remembers snapshots and does nothing: what is left of a
//	                                     pull is containerd's own work
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	api "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/contrib/snapshotservice"
	"github.com/containerd/containerd/snapshots"
	remote "github.com/containerd/stargz-snapshotter/snapshot"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

const layerDigest = "containerd.io/snapshot/cri.layer-digest"

// published is a directory with unpacked layers.
type published string

func (p published) Mount(_ context.Context, at string, labels map[string]string) error {
	_, hex, ok := strings.Cut(labels[layerDigest], ":")
	if !ok || len(hex) < 2 {
		return fmt.Errorf("no digest of a layer in %q", labels[layerDigest])
	}
	layer := filepath.Join(string(p), ".layers", hex[:2], hex, "layerfs")
	if _, err := os.Stat(layer); err != nil {
		return err
	}
	return unix.Mount(layer, at, "", unix.MS_BIND, "")
}

func (published) Check(_ context.Context, at string, _ map[string]string) error {
	_, err := os.Stat(at)
	return err
}

func (published) Unmount(_ context.Context, at string) error {
	return unix.Unmount(at, 0)
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "gopeer:", err)
		os.Exit(1)
	}
}

func serve(snapshotter snapshots.Snapshotter, socket string) {
	server := grpc.NewServer()
	api.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	// A peer that was killed has left its socket.
	_ = os.Remove(socket)
	listener, err := net.Listen("unix", socket)
	check(err)
	check(server.Serve(listener))
}

func main() {
	switch arguments := os.Args[1:]; {
	case len(arguments) == 4 && arguments[0] == "bind":
		snapshotter, err := remote.NewSnapshotter(context.Background(), arguments[2], published(arguments[1]),
			remote.AsynchronousRemove)
		check(err)
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, unix.SIGINT, unix.SIGTERM)
		go func() {
			<-stop
			check(snapshotter.Close())
			os.Exit(0)
		}()
		serve(snapshotter, arguments[3])
	case len(arguments) == 2 && arguments[0] == "memory":
		serve(&memory{all: map[string]snapshots.Info{}}, arguments[1])
	default:
		check(fmt.Errorf("usage: gopeer bind REPOSITORY ROOT SOCKET, or gopeer memory SOCKET"))
	}
}
