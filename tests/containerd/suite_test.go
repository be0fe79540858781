// Package containerd holds our daemon against containerd's own idea of a snapshotter.
//
// Needs root, for mounts, and the daemon's path in CVMFS_SNAPSHOTTER_BINARY.
package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	binaryVariable  = "CVMFS_SNAPSHOTTER_BINARY"
	sandboxVariable = "CVMFS_SNAPSHOTTER_TEST_SANDBOX"
	patience        = 30 * time.Second

	// The suite looks at the name in one place: under the name of an overlay snapshotter it
	// does not rename a directory of a lower layer. Our mounts are kernel overlayfs without
	// redirect_dir, as those of containerd's own overlayfs snapshotter, so that rename is
	// EXDEV by the kernel's rules. Every other step of the case runs under either name.
	suiteName = "overlayfs"
)

// TestMain runs the tests in mount and pid namespaces of their own: whatever goes wrong, the
// kernel takes all mounts and all daemons away when the tests end.
func TestMain(m *testing.M) {
	if os.Getenv(sandboxVariable) == "" {
		os.Exit(runInSandbox())
	}
	// The suite clears the mask, but has set it back by the time its parallel cases begin.
	syscall.Umask(0)
	os.Exit(m.Run())
}

func runInSandbox() int {
	complain := func(format string, args ...any) int {
		fmt.Fprintf(os.Stderr, format+"\n", args...)
		return 1
	}
	if os.Getuid() != 0 {
		return complain("these tests mount file systems: run them as root")
	}
	if path := os.Getenv(binaryVariable); !filepath.IsAbs(path) {
		return complain("set %s to the absolute path of the daemon, not to %q", binaryVariable, path)
	} else if _, err := os.Stat(path); err != nil {
		return complain("%s: %v", binaryVariable, err)
	}
	self, err := os.Executable()
	if err != nil {
		return complain("%v", err)
	}
	// Pdeathsig follows the thread that starts the process, not the whole program.
	runtime.LockOSThread()
	inner := exec.Command(self, os.Args[1:]...)
	inner.Env = append(os.Environ(), sandboxVariable+"=1")
	inner.Stdin, inner.Stdout, inner.Stderr = os.Stdin, os.Stdout, os.Stderr
	inner.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID,
		// Unlike in Cloneflags, here it also keeps mounts from spreading to the host.
		Unshareflags: syscall.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
	}
	if err := inner.Run(); err != nil {
		if inner.ProcessState != nil && inner.ProcessState.Exited() {
			return inner.ProcessState.ExitCode()
		}
		return complain("the tests did not end by themselves: %v", err)
	}
	return 0
}

func TestContainerdSuite(t *testing.T) {
	testsuite.SnapshotterSuite(t, suiteName, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		d, err := startDaemon(t, root)
		if err != nil {
			return nil, nil, err
		}
		return d.Snapshotter, d.stop, nil
	})
}

// Everything the suite says of a snapshot without a parent must hold of one that stands on a
// published layer without files, too. No case is left out.
func TestContainerdSuiteOverRemoteLayer(t *testing.T) {
	testsuite.SnapshotterSuite(t, suiteName, func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		d, err := startDaemon(t, root)
		if err != nil {
			return nil, nil, err
		}
		base, err := d.pullEmptyLayer(ctx)
		if err != nil {
			return nil, nil, errors.Join(err, d.stop())
		}
		return overRemote{d.Snapshotter, base}, d.stop, nil
	})
}

// daemon is a running daemon and containerd's client for it.
type daemon struct {
	snapshots.Snapshotter
	root, repository string
	command          *exec.Cmd
	exited           chan error
	log              bytes.Buffer // To be read once it exited.
	connection       *grpc.ClientConn
}

// startDaemon starts a daemon on root; its other files lie beside root. The log is shown
// only if the test fails, at its end.
func startDaemon(t *testing.T, root string) (*daemon, error) {
	dir := filepath.Dir(root)
	address, config := filepath.Join(dir, "run", "s.sock"), filepath.Join(dir, "config.toml")
	d := &daemon{root: root, repository: filepath.Join(dir, "repository"), exited: make(chan error, 1)}
	if err := os.MkdirAll(filepath.Join(d.repository, ".layers"), 0o755); err != nil {
		return nil, err
	}
	text := fmt.Sprintf("repository = \"suite.test\"\nabsolute-mountpoint = %q\n", d.repository)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	d.command = exec.Command(os.Getenv(binaryVariable),
		"--address", address, "--root", root, "--config", config, "--log-level", "info")
	d.command.Stdout, d.command.Stderr = &d.log, &d.log
	if err := d.command.Start(); err != nil {
		return nil, err
	}
	go func() { d.exited <- d.command.Wait() }()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon on %s wrote:\n%s", root, d.log.String())
		}
	})
	if err := d.awaitSocket(address); err != nil {
		return nil, errors.Join(err, d.terminate())
	}
	connection, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, errors.Join(err, d.terminate())
	}
	d.connection = connection
	d.Snapshotter = proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "cvmfs-snapshotter")
	return d, nil
}

func (d *daemon) awaitSocket(address string) error {
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		probe, err := net.Dial("unix", address)
		if err == nil {
			return probe.Close()
		}
		if len(d.exited) > 0 || time.Now().After(end) {
			return fmt.Errorf("the daemon does not serve: %w", err)
		}
	}
}

// stop ends a case: removes what the case left, checks that nothing of it stays on disk or
// mounted, and ends the daemon, which must like it.
func (d *daemon) stop() error {
	err := errors.Join(d.removeAll(), d.checkNothingLeft(), d.connection.Close(), d.terminate())
	if err != nil {
		// The suite is about to delete the tree: not through a mount into the repository.
		err = errors.Join(err, mount.UnmountRecursive(d.root, syscall.MNT_DETACH))
	}
	return err
}

// removeAll removes all snapshots, children first, and asks for a cleanup as containerd's
// garbage collector does.
func (d *daemon) removeAll() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for {
		parents, names := map[string]bool{}, []string{}
		err := d.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
			parents[info.Parent], names = true, append(names, info.Name)
			return nil
		})
		if err != nil {
			return err
		}
		if len(names) == 0 {
			return d.Snapshotter.(snapshots.Cleaner).Cleanup(ctx)
		}
		for _, name := range names {
			if !parents[name] {
				if err := d.Remove(ctx, name); err != nil {
					return err
				}
			}
		}
	}
}

func (d *daemon) checkNothingLeft() error {
	var left []string
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(d.root))
	for _, m := range mounts {
		left = append(left, "mount "+m.Mountpoint)
	}
	entries, err2 := os.ReadDir(filepath.Join(d.root, "snapshotter", "snapshots"))
	for _, entry := range entries {
		left = append(left, "directory "+entry.Name())
	}
	if len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("left after all snapshots were removed: %s", strings.Join(left, ", ")))
	}
	return errors.Join(err, err2)
}

func (d *daemon) terminate() error {
	if err := d.command.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case err := <-d.exited:
		if err != nil {
			return fmt.Errorf("the daemon: %w", err)
		}
		return nil
	case <-time.After(patience):
		err := d.command.Process.Kill()
		<-d.exited
		return errors.Join(fmt.Errorf("the daemon does not end %v after SIGTERM", patience), err)
	}
}

// pullEmptyLayer publishes a layer of nothing but markers, which nobody may see, asks for it
// as a pull does, and returns the name of the snapshot that this made.
func (d *daemon) pullEmptyLayer(ctx context.Context) (string, error) {
	digest := strings.Repeat("ab", 32)
	layer := filepath.Join(d.repository, ".layers", digest[:2], digest, "layerfs")
	if err := os.MkdirAll(layer, 0o755); err != nil {
		return "", err
	}
	for _, marker := range []string{".cvmfscatalog", ".wh.nothing"} {
		if err := os.WriteFile(filepath.Join(layer, marker), nil, 0o644); err != nil {
			return "", err
		}
	}
	chain := "sha256:" + strings.Repeat("cd", 32)
	_, err := d.Prepare(ctx, "pull", "", snapshots.WithLabels(map[string]string{
		"containerd.io/snapshot.ref":              chain,
		"containerd.io/snapshot/cri.layer-digest": "sha256:" + digest,
	}))
	if !errdefs.IsAlreadyExists(err) {
		return "", fmt.Errorf("Prepare of a published layer answers %v, not that it already exists", err)
	}
	var found []snapshots.Info
	err = d.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		found = append(found, info)
		return nil
	}, `labels."containerd.io/snapshot.ref"==`+chain+`,parent==""`)
	if err != nil {
		return "", err
	}
	if len(found) != 1 || found[0].Kind != snapshots.KindCommitted {
		return "", fmt.Errorf("the pull of a published layer must leave one committed snapshot, not %v", found)
	}
	return found[0].Name, nil
}

// overRemote puts everything on top of the snapshot base and hides that there is one.
type overRemote struct {
	snapshots.Snapshotter
	base string
}

func (o overRemote) onBase(parent string) string {
	if parent == "" {
		return o.base
	}
	return parent
}

func (o overRemote) hideBase(info snapshots.Info) snapshots.Info {
	if info.Parent == o.base {
		info.Parent = ""
	}
	return info
}

func (o overRemote) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return o.Snapshotter.Prepare(ctx, key, o.onBase(parent), opts...)
}

func (o overRemote) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	return o.Snapshotter.View(ctx, key, o.onBase(parent), opts...)
}

func (o overRemote) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	info, err := o.Snapshotter.Stat(ctx, key)
	return o.hideBase(info), err
}

func (o overRemote) Update(ctx context.Context, info snapshots.Info, paths ...string) (snapshots.Info, error) {
	info, err := o.Snapshotter.Update(ctx, info, paths...)
	return o.hideBase(info), err
}

// Walk filters by itself: a filter on the parent means something else to the daemon, which
// sees the base. The daemon's filters have tests of their own, here and in the first run.
func (o overRemote) Walk(ctx context.Context, fn snapshots.WalkFunc, fs ...string) error {
	filter, err := filters.ParseAll(fs...)
	if err != nil {
		return err
	}
	return o.Snapshotter.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
		if info.Name == o.base {
			return nil
		}
		info = o.hideBase(info)
		if !filter.Match(adaptor(info)) {
			return nil
		}
		return fn(ctx, info)
	})
}
