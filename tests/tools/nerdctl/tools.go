//go:build tools

package tools

import _ "github.com/containerd/nerdctl/cmd/nerdctl"
